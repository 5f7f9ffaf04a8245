"""Raw images to betons."""
