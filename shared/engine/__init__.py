"""The model side that both kinds of worker share: loading, probing, partial attention, encoding."""
