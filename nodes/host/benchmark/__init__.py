"""What HPFA costs inside ComfyUI, measured in the host's own Python."""
