"""Rival methods, one file each, under the Protocols of keyanon/types.py; `ls conf/anonymizer` shows what there is."""
