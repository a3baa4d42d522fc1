"""Pictures: files in and out, and labelled sheets."""
