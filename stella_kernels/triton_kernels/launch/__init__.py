"""What launches share: sizes of tiles, the table of addresses, the device, and autotuning with its cache on disk."""
