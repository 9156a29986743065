"""From a graph to packages of torch."""
