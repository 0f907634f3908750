"""Pure numerics: arrays in, arrays out. No files, no models, no devices chosen elsewhere."""
