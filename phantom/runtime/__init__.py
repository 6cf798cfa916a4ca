"""Where a solve meets the rest of torch: devices, autocast, torch.compile, torch.func, threads and ranks."""
