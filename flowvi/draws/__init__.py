"""The table of draws: sampling, resampling, the verdict, predictions."""
