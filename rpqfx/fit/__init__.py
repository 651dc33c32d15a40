"""Dense weights into codes and codebooks."""

from rpqfx.fit.kmeans import kmeans
from rpqfx.fit.product import Fit, fit_codebooks

__all__ = ["Fit", "fit_codebooks", "kmeans"]
