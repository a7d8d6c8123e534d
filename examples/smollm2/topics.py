"""What the prompts of `tasks.py` are about: plain facts and words, each used in one split only."""

# "question = answer"; several right answers are separated by "/".
FACTS = """
What is the capital of France? = Paris
What is the capital of Italy? = Rome
What is the capital of Spain? = Madrid
What is the capital of Germany? = Berlin
What is the capital of Japan? = Tokyo
What is the capital of China? = Beijing
What is the capital of Russia? = Moscow
What is the capital of Egypt? = Cairo
What is the capital of Greece? = Athens
What is the capital of Portugal? = Lisbon
What is the capital of Austria? = Vienna
What is the capital of Sweden? = Stockholm
What is the capital of Norway? = Oslo
What is the capital of Ireland? = Dublin
What is the capital of Canada? = Ottawa
What is the capital of Poland? = Warsaw
What is the capital of Cuba? = Havana
What is the capital of Kenya? = Nairobi
What is the capital of Peru? = Lima
What is the capital of Turkey? = Ankara
What is the capital of Hungary? = Budapest
What is the capital of England? = London
What is the capital of Denmark? = Copenhagen
What is the capital of Finland? = Helsinki
What is the capital of Thailand? = Bangkok
What is the capital of South Korea? = Seoul
What language is spoken in Brazil? = Portuguese
What language is spoken in Mexico? = Spanish
What language is spoken in Austria? = German
What language is spoken in Quebec? = French
What language is spoken in Egypt? = Arabic
What language is spoken in Tokyo? = Japanese
What language is spoken in Rome? = Italian
What language is spoken in Moscow? = Russian
What color is the sky on a clear day? = Blue
What color is grass? = Green
What color is snow? = White
What color is blood? = Red
What color is a ripe banana? = Yellow
What color is coal? = Black
What color is an orange? = Orange
What color is chocolate? = Brown
What is the opposite of hot? = Cold
What is the opposite of up? = Down
What is the opposite of big? = Small/Little
What is the opposite of happy? = Sad/Unhappy
What is the opposite of day? = Night
What is the opposite of fast? = Slow
What is the opposite of wet? = Dry
What is the opposite of old? = Young/New
What is the opposite of open? = Closed/Close/Shut
What is the opposite of light? = Dark/Heavy
What is the opposite of left? = Right
What is the opposite of early? = Late
What is the opposite of rich? = Poor
What is the opposite of loud? = Quiet/Soft
What is the opposite of strong? = Weak
What is the opposite of full? = Empty
What animal barks? = Dog
What animal says meow? = Cat
What animal gives us milk? = Cow
What animal gives us wool? = Sheep
What animal makes honey? = Bee/Bees/Honeybee
What animal has a trunk? = Elephant
What animal has black and white stripes? = Zebra
What animal has a very long neck? = Giraffe
What animal is the king of the jungle? = Lion
What animal lays eggs on a farm? = Chicken/Hen
What animal hops and has a pouch? = Kangaroo
What animal spins a web? = Spider
What planet do we live on? = Earth
What is the largest planet? = Jupiter
What is the red planet? = Mars
What planet has large rings? = Saturn
What star is at the center of our solar system? = Sun
What is frozen water called? = Ice
What gas do we breathe to live? = Oxygen/Air
What is the largest ocean? = Pacific
What is the tallest mountain in the world? = Everest
What is the largest continent? = Asia
On which continent is Egypt? = Africa
On which continent is France? = Europe
On which continent is China? = Asia
On which continent is Brazil? = America
What do bees make? = Honey
What is bread made from? = Flour/Wheat
What is cheese made from? = Milk
What is wine made from? = Grapes/Grape
What is paper made from? = Wood/Trees/Pulp
What is the first day of the week after Sunday? = Monday
What day comes after Tuesday? = Wednesday
What day comes after Friday? = Saturday
What month comes after January? = February
What month comes after May? = June
What month comes after August? = September
What season comes after winter? = Spring
What season comes after summer? = Autumn/Fall
What organ pumps blood? = Heart
What organ do we think with? = Brain
What do we see with? = Eyes/Eye
What do we hear with? = Ears/Ear
What do we smell with? = Nose
Who wrote Romeo and Juliet? = Shakespeare
Who wrote Hamlet? = Shakespeare
Who painted the Mona Lisa? = Leonardo/Vinci
What metal is used in a thermometer? = Mercury
What precious metal is yellow? = Gold
What currency is used in Japan? = Yen
What currency is used in France? = Euro/Euros
What currency is used in the USA? = Dollar/Dollars
What currency is used in England? = Pound/Pounds
What tool drives a nail? = Hammer
What do you wear on your feet? = Shoes/Socks/Shoe
What do you wear on your head? = Hat/Cap
What is the smallest planet? = Mercury
What do cows eat? = Grass/Hay
What is the opposite of win? = Lose/Loss
What is the opposite of true? = False/Untrue
What fruit is used to make cider? = Apple
What animal says quack? = Duck
What language is spoken in Berlin? = German
What color is a ripe tomato? = Red
"""

NUMBERS = """
How many legs does a dog have? = 4
How many legs does a spider have? = 8
How many legs does an insect have? = 6
How many legs does a bird have? = 2
How many wheels does a car have? = 4
How many wheels does a bicycle have? = 2
How many wheels does a tricycle have? = 3
How many days are in a week? = 7
How many days are in a year? = 365
How many days are in April? = 30
How many days are in January? = 31
How many months are in a year? = 12
How many hours are in a day? = 24
How many minutes are in an hour? = 60
How many seconds are in a minute? = 60
How many weeks are in a year? = 52
How many sides does a triangle have? = 3
How many sides does a square have? = 4
How many sides does a pentagon have? = 5
How many sides does a hexagon have? = 6
How many sides does an octagon have? = 8
How many letters are in the English alphabet? = 26
How many vowels are in the English alphabet? = 5
How many continents are there? = 7
How many oceans are there? = 5
How many planets are in the solar system? = 8
How many states are in the USA? = 50
How many fingers are on one hand? = 5
How many fingers do two hands have? = 10
How many eyes does a person have? = 2
How many noses does a person have? = 1
How many players are in a soccer team? = 11
How many strings does a violin have? = 4
How many strings does a guitar have? = 6
How many eggs are in a dozen? = 12
How many years are in a century? = 100
How many years are in a decade? = 10
How many centimeters are in a meter? = 100
How many cents are in a dollar? = 100
How many seasons are in a year? = 4
How many colors are in a rainbow? = 7
How many arms does an octopus have? = 8
"""

YES_NO = """
Is the sun a star? = yes
Is the moon bigger than the sun? = no
Is a dog an animal? = yes
Is a rose an animal? = no
Is a carrot a vegetable? = yes
Is a hammer a fruit? = no
Is ice cold? = yes
Is fire cold? = no
Is Paris in France? = yes
Is Tokyo in Germany? = no
Is water wet? = yes
Is a rock alive? = no
Is gold a metal? = yes
Is wood a metal? = no
Is a whale a mammal? = yes
Is a chair a bird? = no
Is ten more than five? = yes
Is two more than nine? = no
Is the sky blue? = yes
Is grass purple? = no
Is an apple a fruit? = yes
Is a car a plant? = no
Is Africa a continent? = yes
Is London a country? = no
Is a violin an instrument? = yes
Is a spoon an instrument for music? = no
Is snow white? = yes
Is coal white? = no
Is honey sweet? = yes
Is a lemon sweet like sugar? = no
Is a giraffe tall? = yes
Is a mouse bigger than a horse? = no
Is Monday a day? = yes
Is Monday a month? = no
Is July a month? = yes
Is winter hotter than summer? = no
Is a train faster than a snail? = yes
Is a turtle faster than a plane? = no
Is an eagle a bird? = yes
Is a shark a plant? = no
Is milk a drink? = yes
Is a pillow a drink? = no
Is a triangle a shape? = yes
Is a banana a shape with three sides? = no
Is Earth a planet? = yes
Is the ocean dry? = no
Is chess a game? = yes
Is a cloud made of stone? = no
Is a tiger a cat? = yes
Is a penguin a fish? = no
Is a piano an instrument? = yes
Is a shoe a food? = no
Is bread a food? = yes
Is sand a liquid? = no
Is a doctor a person? = yes
Is a bicycle an animal? = no
Is Friday a day? = yes
Is Spain in Asia? = no
Is a cow a farm animal? = yes
Is the night bright? = no
"""

ITEMS = (
    "apples pears plums lemons grapes melons cherries peaches carrots onions potatoes beans peas cabbage garlic rice "
    "bread butter cheese milk eggs salt sugar honey flour tea coffee juice water soup salad pasta chairs tables beds "
    "lamps desks shelves sofas mirrors pens pencils books paper rulers maps hammers nails screws saws ropes ladders "
    "paint brushes shirts shoes socks hats gloves scarves coats belts dogs cats cows horses sheep goats ducks geese "
    "trains buses cars boats planes bikes trucks ferries gold silver copper iron red green blue yellow pink purple "
    "guitars drums flutes violins pianos trumpets tents torches blankets kettles cups plates forks spoons knives bowls"
).split()

TOPICS = (
    "rain snow wind bread cheese coffee tea music dance chess football tennis cats dogs horses birds fish bees trees "
    "flowers roses grass rivers lakes mountains deserts islands beaches forests gardens farms cities trains bicycles "
    "boats planes cars bridges castles museums libraries schools books poems films paintings cameras clocks computers "
    "robots rockets stars winter summer spring autumn sleep dreams friends soup pizza apples lemons chocolate honey "
    "salt sugar ice fire gold silver glass paper wool shoes hats umbrellas mirrors lamps candles kites balloons "
    "penguins elephants tigers whales owls frogs butterflies"
).split()

WORDS = (
    "happy quiet bright morning people water small often world green night house always never long warm cold light "
    "family soft early time heart strong blue simple good place slow today every young old sweet deep open fresh "
    "children work home beautiful important together"
).split()
