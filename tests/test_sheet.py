"""What a page keeps of its form, while answers overtake each other."""

from ui.sheet import Sheet


def test_an_edit_that_is_answered_after_another_drawing_says_nothing_about_that_one():
    blank, nothing = Sheet.blank({"rate": "1e-4", "seed": 20})
    kept = Sheet(blank, nothing).kept({"rate": "0.0002"}, {"rate": "2e-4", "seed": 20}, ["seed"])
    sheet = Sheet(blank, kept)
    assert sheet.holds == {"rate": "0.0002", "seed": 20} and sheet.stands_for == {"rate": "2e-4", "seed": 20}
    assert sheet.waiting == ["seed"] and not sheet.overtaken
    kept = sheet.kept({"seed": 7}, {"rate": "2e-4", "seed": 7}, [])
    assert Sheet(blank, kept).holds == {"rate": "0.0002", "seed": 7}
    for again in (blank["fields"], {"rate": "1e-3", "seed": 0}):
        sheet = Sheet(Sheet.drawn(again), kept)
        assert sheet.holds == sheet.stands_for == again and sheet.overtaken
