"""What every room uses: errors, files, device, machine, distributed, the compiled C library."""
