"""What a study found: a page (`html.render`), a terminal table and a sentence (`table`)."""
