"""(next commit)"""
