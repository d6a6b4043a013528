"""The bridges between frameworks that core itself has; heedful-torch adds its own."""
