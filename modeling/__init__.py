"""Model classes, visual decoder, visual-token compression. Owner of what ships to the Hub."""
