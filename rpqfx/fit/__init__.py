"""Dense weights into codes and codebooks."""

from rpqfx.fit.k_means import kmeans
from rpqfx.fit.product import Fit, fit_codebooks
from rpqfx.fit.refitting import refit
from rpqfx.fit.residual import encode, train

__all__ = ["Fit", "encode", "fit_codebooks", "kmeans", "refit", "train"]
