"""Text that is HTML already."""


class Html(str):
    """HTML to be put into a page as it stands; every other string is escaped."""

    __slots__ = ()
