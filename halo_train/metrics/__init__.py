"""Quantisation-error metrics: which layer, tensor and product loses accuracy to 8 bits, and what another recipe would do.

"""

from .products import PRODUCTS, ProductError, measure_products, product_errors, sqnr_db

__all__ = [
    "PRODUCTS",
    "ProductError",
    "measure_products",
    "product_errors",
    "sqnr_db",
]
