"""What lies on disk: manifests, records of builds, and the folders that hold them."""
