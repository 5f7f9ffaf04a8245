"""fastproj: does this projection head learn a better encoder? Images to linear-probe accuracy."""

__version__ = "0.1.0"
