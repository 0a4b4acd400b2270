"""What several parts of the product use: parsers, files, plots and the private names of others."""
