"""The journal's schema, revision by revision; ``secagg.coordinator.sqlite`` applies them."""
