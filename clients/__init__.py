"""The client side: session, file, mapping, the launcher of a coordinator of one's own, and the command line."""
