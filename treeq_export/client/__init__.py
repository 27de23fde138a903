"""The other side of a Triton server: requests, health, load tests, a web page."""
