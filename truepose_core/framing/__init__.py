"""A person cut out of a photo, put into a frame, and pasted back."""
