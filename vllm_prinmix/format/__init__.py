"""The delta on disk (docs/format.md): the only thing that the compressor and the plugin share."""
