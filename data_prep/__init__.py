"""Raw images to betons: the command ``data_prep/write_ffcv.py`` and its parts."""
