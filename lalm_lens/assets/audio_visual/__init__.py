"""The tiny model that hears and sees: its pictures, its clips with pictures, and how it was trained."""
