"""What an encoder is worth elsewhere: detection on its feature maps, by torchvision's builders."""
