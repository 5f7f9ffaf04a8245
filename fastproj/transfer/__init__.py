"""What an encoder is worth elsewhere: detection and segmentation on its feature maps."""
