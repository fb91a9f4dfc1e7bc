"""What runs beside a vLLM server, in its environment: nothing here may import this repository or its dependencies."""
