"""What every storey may use: files, names, processes, resources, versions. Imports nothing of the package."""
