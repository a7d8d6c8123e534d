"""GPUs by name: memory and links, from NVIDIA's data sheets of the SXM cards; peaks are those of metrics/flops.py."""

from dataclasses import dataclass

from fuserl_megatron.metrics.flops import peak_tflops
from fuserl_megatron.util.errors import UserError
from fuserl_megatron.util.text import nearest


@dataclass(frozen=True)
class Card:
    """One kind of GPU. Rates per second; links are those of one GPU and direction."""

    name: str
    memory: float
    """Bytes."""
    memory_bandwidth: float
    nvlink: float
    """Bytes/s inside a node."""
    network: float = 50e9
    """Bytes/s between nodes: 400 Gb/s for each GPU."""
    per_node: int = 8

    def peak(self, number_format: str) -> float:
        """Dense FLOP/s of the tensor cores in bf16 or fp8.

        Raises:
            UserError: it has none of that format.
        """
        tflops = peak_tflops(self.name, number_format)
        if tflops is None:
            raise UserError(f"--card {self.name}: has no {number_format}; trainer.precision=bf16 would work.")
        return tflops * 1e12


CARDS = {
    card.name: card
    for card in (
        Card("A100", 80e9, 2.04e12, 300e9, 25e9),
        Card("H100", 80e9, 3.35e12, 450e9),
        Card("H200", 141e9, 4.8e12, 450e9),
        Card("B200", 180e9, 8e12, 900e9),
    )
}


def card_of(name: str) -> Card:
    """The card of that name, in any case of letters.

    Raises:
        UserError: it is not known.
    """
    if name.upper() not in CARDS:
        raise UserError(f"--card {name}: not one of {', '.join(CARDS)}.{nearest(name.upper(), CARDS)}")
    return CARDS[name.upper()]
