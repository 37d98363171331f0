"""A page rendered with Chameleon: a catalogue with nested lists and macros.

`size` is the number of products on the page. The template is compiled at
import, as a web application does.
"""

import hashlib
import json
import random

from chameleon import PageTemplate

DEFAULT_SIZE = 600
MAX_SIZE = 20_000
EXCERPT = 160

PAGE = PageTemplate(
    """<!DOCTYPE html>
<html lang="en">
  <head>
    <meta charset="utf-8" />
    <title>${title}</title>
    <script type="application/json" tal:content="structure summary"></script>
  </head>
  <body>
    <h1>${title}</h1>
    <p class="note" tal:condition="sold_out">${sold_out} products are sold out.</p>
    <nav><a tal:repeat="name categories" href="#${name}">${name}</a></nav>
    <table tal:repeat="(name, products) categories.items()" id="${name}">
      <caption>${name}: ${len(products)} products</caption>
      <tr tal:repeat="product products"
          class="${'even' if repeat.product.even else 'odd'}"
          tal:attributes="data-sold-out 'yes' if product['stock'] == 0 else None">
        <td>${repeat.product.number}</td>
        <td><b tal:omit-tag="product['price'] &lt; 5000">${product['name']}</b></td>
        <td>${'%.2f' % (product['price'] / 100)}</td>
        <td><ul><li tal:repeat="tag product['tags']">${tag}</li></ul></td>
        <td tal:switch="product['stock']">
          <span tal:case="0">sold out</span>
          <span tal:case="default">${product['stock']} left</span>
        </td>
      </tr>
    </table>
  </body>
</html>
"""
)

ADJECTIVES = ["plain", "small & light", "<strong>", "folding", "\"quoted\"", "grön", "steel"]
NOUNS = ["lamp", "kettle", "ladder", "bicycle", "chair", "radio", "compass", "blanket"]
CATEGORIES = ["home", "kitchen", "outdoors", "travel", "workshop"]
TAGS = ["new", "repairable", "sale", "gift", "heavy", "recycled", "bestseller"]


def generate(seed, count):
    """Products by category; a category without products is left out."""
    rng = random.Random(seed)
    categories = {}
    for _ in range(count):
        product = {
            "name": f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} {rng.randrange(1000)}",
            "price": rng.randrange(99, 20_000),
            "stock": max(0, rng.randrange(-20, 200)),
            "tags": rng.sample(TAGS, rng.randint(0, 3)),
        }
        categories.setdefault(rng.choice(CATEGORIES), []).append(product)
    return dict(sorted(categories.items()))


def handler(event, context):
    seed = int(event.get("seed", 0))
    size = int(event.get("size", DEFAULT_SIZE))
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"size must be 1 to {MAX_SIZE}, not {size}")

    categories = generate(seed, size)
    products = [product for group in categories.values() for product in group]
    summary = {name: sum(p["price"] for p in group) for name, group in categories.items()}
    page = PAGE.render(
        title=f"Catalogue {seed}",
        categories=categories,
        summary=json.dumps(summary, sort_keys=True),
        sold_out=sum(product["stock"] == 0 for product in products),
    )
    data = page.encode()
    return {
        "products": size,
        "bytes": len(data),
        "summary": summary,
        "excerpt": page[-EXCERPT:],
        "sha256": hashlib.sha256(data).hexdigest(),
    }
