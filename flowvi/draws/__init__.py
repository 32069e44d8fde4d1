"""Tables of draws: sampling, resampling, verdict, predictions."""
