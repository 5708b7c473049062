"""The page of a run in a real browser, compared with what numpy computes from the run's files.

REPORT_RUN=log/demo REPORT_SCREENSHOT=report.png python -m pytest tests/test_browser.py -k screenshot

writes the screenshot of a run's page for README.
"""

import json
import os
import re
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from conftest import HANG
from PIL import Image
from test_report import put_run

import data_manager
import report
import toy
from page import found

WINDOW = 1340, 2220  # pixels


@pytest.fixture(scope='module')
def browser():
    """Headless Chromium; without it the tests skip, with a line that says so."""
    webdriver = pytest.importorskip('selenium.webdriver', reason='no selenium: the page is not tested in a browser')
    chromium, driver = shutil.which('chromium'), shutil.which('chromedriver')
    if not chromium or not driver:
        pytest.skip('no chromium and chromedriver here: the page is not tested in a browser')
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    size = ','.join(map(str, WINDOW))
    for argument in ('--headless=new', '--no-sandbox', '--disable-dev-shm-usage', '--hide-scrollbars'):
        options.add_argument(argument)
    options.add_argument(f'--window-size={size}')
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    options.timeouts = {'script': 1000 * HANG, 'pageLoad': 1000 * HANG}
    session = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield session
    session.quit()


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp('page')
    toy.draw_market1501(folder / 'market1501', num_train=2, num_test=30, num_distractors=20)
    run = put_run(folder / 'log', data_manager.init_dataset('market1501', str(folder)))
    report.write(run)
    return run


@pytest.fixture
def page(browser, saved):
    show(browser, saved / 'report.html')
    yield browser
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': []})
    browser.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})


def show(browser, path):
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get('about:blank')  # loading what is there again may return early
    browser.get(path.as_uri())
    WebDriverWait(browser, HANG).until(lambda page: page.execute_script('return document.readyState') == 'complete')


def visible(page) -> list[int]:
    """The queries that can be seen, from the top."""
    script = 'return [...document.querySelectorAll(".query")].filter(each => each.checkVisibility())'
    shown = page.execute_script(f'{script}.map(each => each.dataset.index)')
    return [int(index) for index in shown]


def average_precisions(ranking) -> dict[int, float]:
    """AP of each query that has a match, by definition."""
    found = {}
    for query, (start, end) in enumerate(zip(ranking['offsets'], ranking['offsets'][1:], strict=False)):
        ranks = sorted(ranking['ranks'][start:end])
        if ranks:
            found[query] = np.mean([(number + 1) / rank for number, rank in enumerate(ranks)])
    return found


def test_the_ranks_shown_are_those_of_the_run(page, saved):
    ranking = dict(np.load(saved / 'ranking.npz'))
    ap = average_precisions(ranking)
    decimals = set()
    queries = page.find_elements('css selector', 'article.query')
    assert len(queries) >= 20
    for query in queries:
        index = int(query.get_dom_attribute('data-index'))
        row = query.find_element('css selector', '.ranking')
        assert float(row.get_dom_attribute('data-ap')) == pytest.approx(ap[index])
        script = '[...arguments[0].querySelectorAll(".result")].map(each => ({...each.dataset, text: each.innerText}))'
        shown = page.execute_script(f'return {script}', row)
        assert len(shown) == 10
        ranks = ranking['ranks'][ranking['offsets'][index] : ranking['offsets'][index + 1]]
        assert int(row.get_dom_attribute('data-first-rank')) == ranks[0]
        assert [int(each['rank']) for each in shown if each['match'] == '1'] == [rank for rank in ranks if rank <= 10]
        for rank, each in enumerate(shown):
            place, distance = ranking['nearest'][index, rank], ranking['nearest_distances'][index, rank]
            same = ranking['g_pids'][place] == ranking['q_pids'][index]
            assert not same or ranking['g_camids'][place] != ranking['q_camids'][index]  # no junk
            assert (int(each['place']), each['match']) == (place, str(int(same)))
            assert float(each['distance']) == distance
            (text,) = re.findall(rf'^{rank + 1} · ([\d.]+)$', each['text'], re.M)
            assert ('✓' if same else '✕') in each['text'] and float(text) == pytest.approx(distance, rel=2e-3)
            decimals.add(len(text.partition('.')[2]))
            assert f'camera {ranking["g_camids"][place]}' in each['text']
    assert len(decimals) == 1


def test_filters(page, saved):
    ap = average_precisions(dict(np.load(saved / 'ranking.npz')))
    order = sorted(ap, key=lambda query: (ap[query], query))
    everything = visible(page)
    assert everything == [query for query in order if query in everything]
    for name, expected in (('worst', order[:20]), ('best', order[-20:])):
        page.find_element('css selector', f'button[data-filter={name}]').click()
        assert visible(page) == expected
        assert page.find_element('css selector', '[aria-pressed=true]').text == f'{name.capitalize()} 20'
        assert page.find_element('css selector', 'output').text == f'20 of {len(everything)} queries'
    page.find_element('css selector', 'button[data-filter=random]').click()
    assert len(visible(page)) == 20 and set(visible(page)) <= set(everything)
    page.find_element('css selector', 'button[data-filter=all]').click()
    pids = np.load(saved / 'ranking.npz')['q_pids']
    choice = page.find_element('css selector', '#identity option:nth-child(2)')
    pid = int(choice.text)
    choice.click()
    assert visible(page) == [query for query in everything if pids[query] == pid]


def test_keys(page):
    body = page.find_element('css selector', 'body')
    everything = visible(page)

    def here():
        return page.execute_script('return document.activeElement.dataset.index')

    body.send_keys('w')
    assert visible(page) == everything[:20]
    body.send_keys('\ue014')  # the right arrow
    assert here() == str(everything[0])
    page.switch_to.active_element.send_keys('\ue014\ue014\ue012')  # right, right, left
    assert here() == str(everything[1])
    body.send_keys('a')
    assert visible(page) == everything
    colour = page.execute_script('return getComputedStyle(document.body).backgroundColor')
    body.send_keys('t')
    assert page.execute_script('return getComputedStyle(document.body).backgroundColor') != colour
    body.send_keys('?')
    assert page.find_element('css selector', 'dialog').is_displayed()
    page.find_element('css selector', 'dialog button').click()
    assert not page.find_element('css selector', 'dialog').is_displayed()
    body.send_keys('i')
    assert page.switch_to.active_element.get_dom_attribute('id') == 'identity'


def test_every_picture_has_words(page):
    pictures = page.find_elements('css selector', 'img, [role=img]')
    assert len(pictures) > 200
    words = [each.get_dom_attribute('alt') or each.get_dom_attribute('aria-label') for each in pictures]
    assert all(words)
    assert page.execute_script('return [...document.images].every(each => each.complete && each.naturalWidth > 8)')


# Of each text the contrast of its colour with what is below it (WCAG 2.2), signs on frames apart.
CONTRASTS = """
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
function over(...colours) {
  canvas.clearRect(0, 0, 1, 1);
  for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
}
function luminance(pixel) {
  const [r, g, b] = pixel.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
  if (element.closest('[aria-hidden], script, option')) continue;
  const below = [];
  for (let each = element; each; each = each.parentElement) below.unshift(getComputedStyle(each).backgroundColor);
  const style = getComputedStyle(element), own = element.closest('svg') ? style.fill : style.color;
  const [dark, light] = [over(...below), over(...below, own)].map(luminance).sort((a, b) => a - b);
  found.push([(light + 0.05) / (dark + 0.05), element.outerHTML.slice(0, 100)]);
}
return found;
"""


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_texts_stand_out(page, scheme):
    prefers = {'name': 'prefers-color-scheme', 'value': scheme}
    page.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': [prefers]})
    ink = page.execute_script('return getComputedStyle(document.body).color')
    assert ink == {'light': 'rgb(29, 33, 37)', 'dark': 'rgb(228, 231, 234)'}[scheme]
    found = page.execute_script(CONTRASTS)
    assert len(found) > 1000 and min(found)[0] >= 4.5, min(found)


def test_nothing_runs_out_of_a_narrow_window(page):
    narrow = {'width': 400, 'height': 900, 'deviceScaleFactor': 1, 'mobile': False}
    page.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', narrow)
    assert page.execute_script('return document.documentElement.scrollWidth') == 400
    assert all(head.size['height'] < 40 for head in page.find_elements('css selector', '.cameras th'))  # unbroken


@pytest.mark.parametrize('width', [400, 800, 1340])
def test_wide_pictures_and_long_names_stay_in_their_place(page, saved, tmp_path, width):
    """Pictures of a square and of a strip of 8 frames, on the page of a search."""
    files = []
    for number in range(12):
        files.append(str(tmp_path / f'{"a_long_name_without_a_break_" * 3}{number}.png'))
        Image.new('RGB', (60 + 8 * number, 60), 'red').save(files[-1])
    near = [{'rank': rank, 'path': path, 'distance': 1.0, 'match': None} for rank, path in enumerate(files[:10], 1)]
    results = [{'query': query, 'unknown': None, 'results': near} for query in (files[:1], files[:8])]
    facts = dict.fromkeys(('arch', 'height', 'width', 'precision', 'distance'), 'x')
    facts |= {'weights': f'{"long_" * 30}.pth', 'gallery': 12}
    show(page, found.write(tmp_path / 'found.html', results, facts, ''))
    size = {'width': width, 'height': 900, 'deviceScaleFactor': 1, 'mobile': False}
    page.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', size)
    assert page.execute_script('return document.documentElement.scrollWidth') == width
    script = 'return [...document.images].map(each => [each, each.parentElement].map(e => e.getBoundingClientRect()))'
    places = page.execute_script(script)
    assert len(places) == 22
    for image, around in places:
        assert image['width'] > 30 and image['right'] <= around['right'] + 1 and image['left'] >= around['left']
    lists = page.execute_script('return [...document.querySelectorAll("ol")].map(each => each.clientWidth)')
    assert min(lists) >= width / 2  # the results have most of the place


def test_no_error_and_no_request(browser, saved, tmp_path):
    compared = report.compare([saved, saved], tmp_path / 'compare.html')
    for log in ('browser', 'performance'):
        browser.get_log(log)
    for path in (saved / 'report.html', compared):
        show(browser, path)
        for button in browser.find_elements('css selector', '.bar button'):
            button.click()
        messages = [json.loads(entry['message'])['message'] for entry in browser.get_log('performance')]
        urls = [m['params']['request']['url'] for m in messages if m['method'] == 'Network.requestWillBeSent']
        assert path.as_uri() in urls
        assert {url for url in urls if not url.startswith(('data:', 'about:'))} == {path.as_uri()}
    assert browser.get_log('browser') == []


def test_screenshot(browser, saved, tmp_path):
    show(browser, report.write(os.environ.get('REPORT_RUN', saved)).resolve())
    path = Path(os.environ.get('REPORT_SCREENSHOT', tmp_path / 'report.png'))
    with Image.open(BytesIO(browser.get_screenshot_as_png())) as picture:
        picture.convert('RGB').quantize(256, kmeans=1).save(path, optimize=True)  # a third of the bytes
    assert 20_000 < path.stat().st_size < 300_000
