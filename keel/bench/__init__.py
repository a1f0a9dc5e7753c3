"""What things take: latency and bandwidth, measured on the machine at hand."""
