"""Files: tensors in and out as bytes, and the names other libraries give them."""
