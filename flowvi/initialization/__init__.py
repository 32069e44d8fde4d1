"""Where training begins: start points, Gaussian fits, modes."""
