"""Methods: one file each, behind one contract. New method = one file and one line here."""

from atv.methods.atv import ATV
from atv.methods.base import Choice, Method, Prompt
from atv.methods.bm25 import BM25
from atv.methods.elicit import Elicit
from atv.methods.encoder import Encoder
from atv.methods.fixed import Fixed
from atv.methods.full import Full
from atv.methods.i2cl import I2CL
from atv.methods.icl import ICL
from atv.methods.icl_atv import ICLWithATV
from atv.methods.learned_tv import LearnedTV
from atv.methods.linear import Linear
from atv.methods.lora import LoRA
from atv.methods.prefix_tuning import PrefixTuning
from atv.methods.probe import Probe
from atv.methods.zero_shot import ZeroShot

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        *(ZeroShot, ICL, BM25, Elicit, I2CL, Linear, LoRA, PrefixTuning, Full, Probe, Encoder),
        *(LearnedTV, Fixed, ATV, ICLWithATV),
    )
}

__all__ = ["METHODS", "Choice", "Method", "Prompt"]
