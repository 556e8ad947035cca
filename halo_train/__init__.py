"""Train and fine-tune transformers with every large matrix product in 8 bits, Hadamard-rotated where that pays."""

from .calibrate import Calibration, calibrate
from .config import RECIPES, Format, HaloConfig, Scaling
from .convert import ConversionReport, convert_to_halo_training, revert
from .equalizer_state import collect_equalizers, equalizer_state_dict, load_equalizer_state_dict
from .functional import halo_linear
from .hadamard import hadamard_transform, random_rotation
from .linear import HaloLinear
from .metrics import ProductError, QuantMetrics, QuantSample, measure_products
from .quantize import Quantized, quantize
from .recipe_file import load_recipe

__version__ = "0.1.0"

__all__ = [
    "RECIPES",
    "Calibration",
    "ConversionReport",
    "Format",
    "HaloConfig",
    "HaloLinear",
    "ProductError",
    "QuantMetrics",
    "QuantSample",
    "Quantized",
    "Scaling",
    "calibrate",
    "collect_equalizers",
    "convert_to_halo_training",
    "equalizer_state_dict",
    "hadamard_transform",
    "halo_linear",
    "load_equalizer_state_dict",
    "load_recipe",
    "measure_products",
    "quantize",
    "random_rotation",
    "revert",
]
