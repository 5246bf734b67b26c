"""A page on which one purifies a picture and watches: `coup-fast app`.

`bench` holds the networks, `pictures` reads what the user gives, `experiment` attacks and purifies
it, `drawing` makes of the result what is shown, and `page` is the page itself, the only module that
knows gradio.
"""
