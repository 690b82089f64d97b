"""The Space: a web page on which people try what this package does. The folder is a Hugging Face Space as it is."""
