#!/bin/sh
# The whole comparison: bash examples/noisy/run.sh [DIR] [WORKERS]. Repeat it to go on where it stopped.
set -e
cd "$(dirname "$0")/../.."
dir=${1:-runs/noisy} here=examples/noisy
python=${PYTHON:-.venv/bin/python}
mkdir -p "$dir"
for name in student:phase learned:learned; do
  out=$dir/${name#*:}
  [ -e "$out.jsonl" ] || { $python "$here/${name%:*}.py" --out "$out.tmp" && mv "$out.tmp" "$out.jsonl"; }
done
$python $here/compare.py --dir "$dir" --workers "${2:-2}"
$python $here/table.py "$dir/results.jsonl" > "$dir/tables.md"
$python $here/plots.py --results "$dir/results.jsonl" --phase "$dir/phase.jsonl" --out "$dir"
echo "Tables: $dir/tables.md; plots: $dir/noisy_*.png"
for file in results phase learned; do
  if cmp -s "$dir/$file.jsonl" "$here/results/$file.jsonl"; then echo "$file.jsonl is the kept one, to the last digit"
  else echo "$file.jsonl differs from the kept one: diff $dir/$file.jsonl $here/results/$file.jsonl"; fi
done
