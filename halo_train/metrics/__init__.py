"""Quantisation-error metrics: which layer, tensor and product loses accuracy to 8 bits, and what another recipe would do.

:func:`measure_products` measures once, over whole tensors; :class:`QuantMetrics` samples while a model trains.
"""

from .collect import QuantMetrics
from .products import PRODUCTS, ProductError, measure_products, product_errors, sqnr_db
from .sample import QuantSample

__all__ = [
    "PRODUCTS",
    "ProductError",
    "QuantMetrics",
    "QuantSample",
    "measure_products",
    "product_errors",
    "sqnr_db",
]
