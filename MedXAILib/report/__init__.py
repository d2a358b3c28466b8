"""An explanation as people read it: a picture, a page, and how well it meets a segmentation."""
