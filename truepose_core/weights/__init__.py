"""Files of weights: any checkpoint opened without running what is in it, ours loaded strictly."""
