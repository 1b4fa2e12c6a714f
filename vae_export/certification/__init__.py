"""The float64 reference, golden examples, and the certificate measured against them."""
