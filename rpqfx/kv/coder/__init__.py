"""One layer's keys or values to codes and back, and the calibration of that."""
