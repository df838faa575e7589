"""Published multi-task systems, one module each: `from mtjax.systems import rep_mtl`.

The modules are not imported here: each of them is readable alone, brings its own
requirements, and stands on its own page of the site with its measured results.
"""
