"""Ways into other libraries: one module each, with one ``register()``, imported only on demand."""
