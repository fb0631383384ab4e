"""Generate text: schedule requests over a paged cache, decode and sample."""
