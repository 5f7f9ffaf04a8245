"""Views: uint8 crops become the augmented, normalized floats that an encoder sees."""
